"""Evaluation of a streaming model: what it says, when it says it, and whether it should have.

Read in this order: `schedule` (what happens to a stream), `decoder` (the model answers live), `teacher_forced`
(the model answers with the reference's past), `transcript` (what both leave behind), `metrics` (the figures),
`prepared` (samples made ready once), `runner` (all streams of a corpus), `offline` (conversations), `benchmarks`
(public ones), `invariance` (two properties as figures), `live` (one clip, in real time).
"""
