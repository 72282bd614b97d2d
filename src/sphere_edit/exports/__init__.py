"""The forms in which an edited model leaves its run, one file each; card, manifest and proof are shared by all of them."""
