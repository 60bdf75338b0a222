"""``python -m sotalign_jax`` is ``sotalign``."""


def run() -> None:
    """Entry point; what is imported above here, every worker process would import too."""
    from sotalign_jax.main import run

    run()


if __name__ == "__main__":
    run()
