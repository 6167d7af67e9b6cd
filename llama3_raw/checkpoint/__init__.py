"""Files and `Weights`: what a folder holds, mapped, checked, split, loaded and written."""
