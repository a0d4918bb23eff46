"""The app: a page on the queue. It holds no logic that the command line lacks."""
