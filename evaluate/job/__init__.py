"""What every evaluation is made of: its subject, its data and features, and the report that it leaves."""
