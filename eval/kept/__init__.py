"""What is kept on disk, saved sessions and prefix stores: listed, looked into, removed."""
