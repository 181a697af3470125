"""The whole method around the optimizer: data, encoders, models, training, evaluation and the command line."""
