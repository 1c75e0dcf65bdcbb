"""Real models and data for the demo, the benchmarks and the tests. Fetched at run time, never committed.

| module      | network                             | task of `evaluate`                           | fetches |
|-------------|-------------------------------------|----------------------------------------------|---------|
| `minilm`    | all-MiniLM-L6-v2, a BERT encoder    | 20 Newsgroups, linear probe on the embedding | yes     |
| `mobilenet` | MobileNetV2, ImageNet weights       | Fashion-MNIST, linear probe on the features  | yes     |
| `smollm2`   | SmolLM2-135M, a Llama decoder       | perplexity on books and dialogue             | yes     |
| `residual`  | three convolutions and a skip       | direction of synthetic gratings              | no      |

Each has the same three functions:

    build()            -> Example(module, args, dynamic_shapes): what an export needs
    calibration(...)   -> iterator of batches, each a dict of arrays by input name
    evaluate(run, ...) -> Evaluation(metric, value, samples, standard_error, unit)

where `run` takes a batch and returns a mapping of arrays by output name: `qonnx.runtime.session(path).run`, or
`common.torch_run(module)` for the float network. Calibration data, the data that fit a probe and the data that test it
never overlap, and come in the same order every time.
"""
