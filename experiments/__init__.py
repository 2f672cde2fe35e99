"""What is asked: train, measure, forecast, price, report."""
