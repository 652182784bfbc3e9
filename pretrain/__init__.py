"""Stage one: unlabelled images in, checkpoint out."""
