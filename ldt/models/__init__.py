"""Networks that are not trained here: autoencoders and text encoders."""
