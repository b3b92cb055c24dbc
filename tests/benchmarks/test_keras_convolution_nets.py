"""The table of quantized convolution nets."""

import jax
import keras
import pytest

from benchmarks import keras_convolution_nets as nets


def small_net(input_shape, **options):
    assert options["weights"] is None
    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(8, 3, strides=4)(inputs)
    x = keras.layers.BatchNormalization()(x)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))


@pytest.mark.slow
def test_the_table_has_a_row_for_each_net_and_mode(monkeypatch, capsys):
    monkeypatch.setattr(keras.applications, "MobileNetV2", small_net)
    with jax.numpy_rank_promotion("allow"):  # Keras relies on it.
        nets.main(["--models", "MobileNetV2", "--modes", "int8", "int4"])
    printed = capsys.readouterr().out
    rows = [line.split("│") for line in printed.splitlines() if "│ MobileNetV2 │" in line]
    assert [row[2].strip() for row in rows] == ["float", "int8", "int4"]
    errors = [float(row[5]) for row in rows[1:]]
    assert 0 < errors[0] < 0.02 < errors[1] < 0.2
