"""``ironmoe bench offload``: what less memory under attack costs."""
