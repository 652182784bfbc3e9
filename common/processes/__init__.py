"""The processes of a job: how they start, meet, talk and stop."""
