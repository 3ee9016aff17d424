"""Clips of real videos: which frames of a video a model sees, how videos and folders of frames are read and found."""
