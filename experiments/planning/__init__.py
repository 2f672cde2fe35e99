"""The search for a layout: what can be, what it would take, why it loses."""
