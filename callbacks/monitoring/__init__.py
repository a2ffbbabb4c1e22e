"""What a run shows of itself: throughput, progress, TensorBoard's layout, hyper-parameters."""
