"""Published training runs, forecast and compared: reading tables, telling frameworks apart, scoring."""
