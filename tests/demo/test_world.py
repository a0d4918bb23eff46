"""Clips are reproducible, objects stay where they belong, and held-out stays held out."""

import pytest
import torch
import world


def scenes(count, seed=7, **kwargs):
    return world.sample_scene(count, torch.Generator().manual_seed(seed), **kwargs)


def test_same_seed_same_clip():
    first, second = (world.render(scenes(2), 5, 64)[0] for _ in range(2))
    assert torch.equal(first, second)
    other, _ = world.render(scenes(2, seed=8), 5, 64)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("style", world.STYLES)
def test_one_clip_does_not_depend_on_its_batch(style):
    scene = scenes(3, objects=2)
    whole, _ = world.render(scene, 5, 64, style)
    alone, _ = world.render(scene[1:2], 5, 64, style)
    assert torch.allclose(whole[1:2], alone, atol=1e-5)


@pytest.mark.parametrize("objects", [1, 2])
def test_objects_stay_inside(objects):
    centre, radius = world.paths(scenes(500, objects=objects), world.FRAMES)
    assert (centre.abs().amax(-1) + radius).max() < 1


def test_two_objects_keep_to_their_halves_and_differ():
    scene = scenes(500, objects=2)
    centre, radius = world.paths(scene, world.FRAMES)
    assert (centre[:, 0, :, 0] + radius[:, 0]).max() < 0
    assert (centre[:, 1, :, 0] - radius[:, 1]).min() > 0
    for name in ("motion", "colour"):
        first, second = getattr(scene, name).unbind(1)
        assert (first != second).all()


@pytest.mark.parametrize("objects", [1, 2])
def test_held_out_never_in_training(objects):
    for unseen in (False, True):
        scene = scenes(500, unseen=unseen, objects=objects)
        held = world.held_out(scene.shape, scene.colour, scene.motion)
        assert held.all() if unseen else not held.any()


def test_hundreds_of_thousands_of_combinations():
    one = len(world.SHAPES) * len(world.COLOURS) * len(world.MOTIONS)
    two = one * one * len(world.BACKGROUNDS)
    assert two > 500_000
    scene = scenes(300, objects=2)
    kinds = [scene.shape, scene.colour, scene.motion, scene.background[:, None]]
    assert len(torch.cat(kinds, 1).unique(dim=0)) > 295


def test_a_size_is_that_of_every_object():
    scene = scenes(64, size="small")
    assert (scene.size == 0).all()
    assert scene.radius.max() < scenes(64, size="large").radius.min()
