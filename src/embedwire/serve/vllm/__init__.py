"""The router in front of stock vLLM servers: what no other part of ``serve`` needs.

The app            app.py
A request's way    request.py (its media), dispatch.py (media to encoders, then the request to a language server), answer.py
Its media items    items.py (each encoded once), encoders.py (by which encoder)
Why it failed      ends.py (causes that connectors report), failures.py (what follows from them)
"""
