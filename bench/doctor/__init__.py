"""``ironmoe doctor``: test the installation, and compile every kernel."""
