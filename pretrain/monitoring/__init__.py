"""What is watched while a run trains; never part of the loss."""
