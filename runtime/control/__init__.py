"""What the controller is made of, layer upon layer: each calls only itself and those below it.

``state`` (what is known) <- ``progress`` (steps, records, the end) <- ``boundary`` (planned changes) <-
``recovery`` (after a loss) <- ``runtime.controller`` (events in, outputs out).
"""
