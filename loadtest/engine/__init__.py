"""The CPU engine without the services: beside other engines, and taken apart. Run by hand on a quiet machine."""
