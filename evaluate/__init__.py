"""Stage two: a checkpoint in, numbers and pictures out. Scripts on top, what they share in the rooms below."""
