"""The cluster: router, prefill workers and decode workers on Ray Serve. Start reading at `app.py`."""
