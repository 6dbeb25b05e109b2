"""Evaluation of a streaming model: what it says, when it says it, and whether it should have.

Read in this order: `timeline` (what a stream asks for), `decoder` (the model answers live), `teacher_forced`
(the model answers with the reference's past), `transcript` (what both leave behind), `metrics` (the figures),
`runner` (all streams of a corpus), `live` (one clip, in real time).
"""
