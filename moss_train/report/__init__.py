"""What a run leaves for people to read: metrics while it goes on (`tracker`), figures and pictures afterwards.

Read in this order: `tracker` and its sinks (`console`, `metrics_file`, `wandb_sink`), `quickstart` (the verdict),
`timelines` and `curves` (the pictures), `html` (the page).
"""
