"""The command line: `tandem up` and what goes with it. Starts the services, is none of them.

Reading order: `__main__`, `cluster` (what is to run), `supervisor` (keeps it running), `status`.
"""
