"""What the reports of several commands are made of: numbers, tables, pictures, pages."""
