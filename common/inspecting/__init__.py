"""What a pile of images is made of, before anything is trained on it: `poslabel inspect DATA`."""
