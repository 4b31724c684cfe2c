"""The services: each folder is one process. They share code only through `shared`."""
