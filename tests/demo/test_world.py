"""Clips are reproducible, the checker reads them right, and held-out stays held out."""

import checker
import torch
import world


def scenes(count, seed=7, **kwargs):
    return world.sample_scene(count, torch.Generator().manual_seed(seed), **kwargs)


def test_same_seed_same_clip():
    first, second = (world.render(scenes(2), 5, 64)[0] for _ in range(2))
    assert torch.equal(first, second)
    other, _ = world.render(scenes(2, seed=8), 5, 64)
    assert not torch.equal(first, other)


def test_one_clip_does_not_depend_on_its_batch():
    scene = scenes(3)
    whole, _ = world.render(scene, 5, 64)
    alone, _ = world.render(scene[1:2], 5, 64)
    assert torch.allclose(whole[1:2], alone, atol=1e-5)


def test_object_stays_inside():
    scene = scenes(500)
    centre, radius = world.paths(scene, world.FRAMES)
    assert (centre.abs().amax(-1) + radius).max() < 1


def test_held_out_never_in_training():
    for unseen in (False, True):
        scene = scenes(500, unseen=unseen)
        held = world.held_out(scene.shape, scene.colour, scene.motion)
        assert held.all() if unseen else not held.any()


def every_motion_and_shape():
    count = len(world.MOTIONS) * 2
    index = torch.arange(count)
    names = {name: index % k for name, k in world.COUNTS.items()}
    names["shape"] = (index + index // 9) % len(world.SHAPES)
    return world.make_scene(names, torch.Generator().manual_seed(3))


def test_checker_on_right_and_wrong_labels():
    scene = every_motion_and_shape()
    seen = checker.look(world.render(scene, world.FRAMES, 128)[0])
    for name, right in seen.right(scene).items():
        assert right.float().mean() >= 0.94, name
    wrong = scene[torch.roll(torch.arange(len(scene)), 1)]
    assert not seen.right(wrong)["all"].any()


def test_checker_sees_nothing_in_an_empty_clip():
    scene = scenes(2)
    seen = checker.look(world.draw_background(scene, world.FRAMES, 64))
    for name in ("shape", "colour", "size", "motion"):
        assert (getattr(seen, name) == checker.NOTHING).all()
