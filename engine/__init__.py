"""One worker's engine: pages, cache, scheduler, model, sampling. No Ray, no HTTP. Start reading at `engine.py`."""
