"""Files that leave the toolkit: ONNX for serving, safetensors for training on."""
