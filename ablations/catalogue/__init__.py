"""What methods there are, for people: tables and pages."""
