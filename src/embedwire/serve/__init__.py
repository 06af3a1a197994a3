"""Floor 7: HTTP. Knows requests, workers and OpenAI's words; knows no transport and no model.

The servers        front.py is a router's public API: router_app.py and vllm/app.py; encoder_app.py, language_app.py,
                   registry_app.py; run.py runs one
A request's way    exchange.py (body, disconnect, stream), openai.py (schema), faults.py (errors), media.py and
                   addresses.py (what it names), calls.py (to workers), attempts.py (again when one fails), dispatch.py (through
                   the router), answering.py (from the engine)
To vLLM servers    vllm/
Who is there       worker_app.py, registration.py, watch.py; the table is ``embedwire.registry``
What is counted    metrics.py
"""
