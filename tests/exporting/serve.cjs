// Run an ONNX file on inputs given as JSON: node serve.cjs PACKAGE MODEL INPUTS; prints the first output.
const fs = require("fs");
const [package_, model, inputs] = process.argv.slice(2);
const ort = require(package_);
const { name, type, dims, data } = JSON.parse(fs.readFileSync(inputs));
const kinds = { float32: Float32Array, uint8: Uint8Array };

async function main() {
  const session = await ort.InferenceSession.create(fs.readFileSync(model));
  const feeds = { [name]: new ort.Tensor(type, kinds[type].from(data), dims) };
  const found = await session.run(feeds);
  const output = found[session.outputNames[0]];
  console.log(JSON.stringify({ dims: Array.from(output.dims), data: Array.from(output.data) }));
}

main().then(() => process.exit(0), (error) => { console.error(String(error)); process.exit(1); });
