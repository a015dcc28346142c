"""A machine for PTX on the CPU: it runs the code that nvcc and Triton compile for a GPU, where there is none.

`program` reads the text, `instructions` says what each instruction does, `memory` guards what it touches, `machine` runs a
grid of threads, and `backends` puts it in place of a GPU under esfast's own launch code.
"""
