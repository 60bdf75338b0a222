"""Tiny sweeps for the tests of sweeps: two methods, rates chosen on validation, two seeds."""

import tiny_runs


def get_config(arg=None):
    # AdamW, and neither evaluations nor many steps: what is tested is which run happens when.
    return tiny_runs.from_teacher(
        objective="sail", optimizer__name="adamw", steps=20, eval_every=0, checkpoint_every=10
    )


def get_hyper(hyper, arg=None):
    slow = hyper.fixed({"label.method": "slow", "steps": 10})
    rates = (1e-3, 1e30) if arg == "fails" else (1e-3, 1e-2)
    fast = hyper.product(
        hyper.fixed("label.method", "fast"), hyper.sweep("optimizer.learning_rate", rates)
    )
    if arg == "one":
        return hyper.fixed({"label.method": "fast", "steps": 0})
    return hyper.product(hyper.chain(slow, fast), hyper.sweep("seed", range(2)))


def get_table():
    return {
        "rows": "label.method",
        "metrics": ("test/t2i/recall@1", "test/mean_recall@1"),
        "select": "val/mean_recall@1",
        "teacher_rows": {"teacher": "fast"},
        "paper": {"fast": {"test/mean_recall@1": 30.3}},
        "plot": {"x": "optimizer.learning_rate"},
        "caption": "A tiny sweep",
    }
