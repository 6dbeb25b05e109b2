"""Evaluation of a streaming model: what it says, when it says it, and whether it should have.

Read in this order: `schedule` (what happens to a stream), `decoder` (the model answers live), `teacher_forced`
(the model answers with the reference's past), `transcript` (what both leave behind), `metrics` (the figures),
`runner` (all streams of a corpus), `live` (one clip, in real time).
"""
