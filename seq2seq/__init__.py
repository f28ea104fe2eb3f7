"""The application: train, evaluate and run an encoder-decoder on real tasks, with either frontend."""
