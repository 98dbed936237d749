"""What was selected in the forms that other trainers read: one module a format, and what they share."""
