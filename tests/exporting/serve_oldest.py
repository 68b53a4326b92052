"""Run an ONNX file in whatever onnxruntime this Python has: MODEL GIVEN.npy FOUND.npy; prints its version."""

import sys

import numpy as np
import onnxruntime

model, given, found = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
np.save(found, session.run(None, {session.get_inputs()[0].name: np.load(given)})[0])
print(onnxruntime.__version__)  # noqa: T201 - what the test asks
