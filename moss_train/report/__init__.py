"""What a run leaves for people to read: metrics while it goes on (`tracker`), figures and pictures afterwards.

Read in this order: `tracker` and its sinks (`console`, `metrics_file`, `wandb_sink`), `quickstart` (the verdict),
`columns` and `stream_view` (a stream as a person can follow it), `curves`, `html` (the page), `captions` (a clip with
what is said burnt in).
"""
