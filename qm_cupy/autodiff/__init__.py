"""Operations as torch and JAX differentiate and trace them."""
