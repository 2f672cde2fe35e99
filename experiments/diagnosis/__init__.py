"""Why a layout costs what it costs: what is placed where, and what the compiler made of it."""
