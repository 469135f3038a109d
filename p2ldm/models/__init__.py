"""Networks: autoencoder, discriminator, condition encoder, U-Net."""
