from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.optim import set_lr
from vissl_lite.pretext.simsiam import SimSiam


def test_the_rate_of_the_predictor_does_not_fall() -> None:
    task = SimSiam(build_encoder("test_resnet", 32), projection_size=8, hidden_size=4)
    optimizer = task.configure_optimizers()
    set_lr(optimizer, 0.001)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    predictor = {id(parameter) for parameter in task.predictor.parameters()}
    for parameter in task.parameters():
        peak = task.optimizer_settings.lr
        assert rate[id(parameter)] == (peak if id(parameter) in predictor else 0.001)
