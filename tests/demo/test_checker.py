"""The checker reads drawn clips right, and finds what is wrong with clips that are."""

import pytest
import torch
import world

from sagewan.evaluate import checker


def scenes(count, seed=7, **kwargs):
    return world.sample_scene(count, torch.Generator().manual_seed(seed), **kwargs)


def read(scene, side=128, frames=world.FRAMES):
    return checker.look(world.render(scene, frames, side)[0])


def altered(scene, name):
    """The attributes of a scene, one of them another for some object of every clip."""
    wrong = scene.attributes()
    some = wrong[name].clone()
    flat = some if some.ndim == 1 else some[:, 0]
    flat += 1
    flat %= len(world.NAMES[name])
    return wrong | {name: some}


@pytest.mark.parametrize("objects", [1, 2])
def test_drawn_clips_are_read_right(objects):
    scene = scenes(32, objects=objects)
    seen = read(scene)
    for name, right in seen.right(scene.attributes()).items():
        assert right.all(), name


@pytest.mark.parametrize("objects", [1, 2])
def test_wrong_labels_are_not_passed(objects):
    scene = scenes(16, objects=objects)
    seen = read(scene)
    for name in world.NAMES:
        if name != "size" or objects == 1:
            assert not seen.right(altered(scene, name))[name].any(), name


def test_the_order_of_two_objects_counts():
    scene = scenes(8, objects=2)
    swapped = {n: v.flip(1) if v.ndim == 2 else v for n, v in scene.attributes().items()}
    hits = read(scene).right(swapped)
    assert not hits["colour"].any()
    assert not hits["motion"].any()


def test_the_number_of_objects_counts():
    one, two = scenes(8), scenes(8, objects=2)
    assert not read(one).right(two.attributes())["count"].any()
    assert not read(two).right(one.attributes())["count"].any()


def test_an_object_in_pieces_is_none():
    video, _ = world.render(scenes(4), world.FRAMES, 128)
    torn = torch.cat([video, video], -1)[..., ::2]  # two of it, side by side
    stacked = torch.cat([video, video], -2)[..., ::2, :]  # and one above the other
    assert (checker.look(torn).count != 1).all()
    assert (checker.look(stacked).count == checker.NOTHING).all()


def test_an_empty_clip_shows_nothing():
    seen = checker.look(world.draw_background(scenes(2), world.FRAMES, 64))
    for name in ("shape", "colour", "size", "motion"):
        assert (getattr(seen, name) == checker.NOTHING).all()
    assert (seen.count == checker.NOTHING).all()


def test_longer_and_larger_clips_are_read_the_same():
    scene = scenes(1)
    for name, right in read(scene, 320, 33).right(scene.attributes()).items():
        assert right.all(), name


def test_what_is_shown_is_said():
    scene = scenes(1, objects=2)
    words = checker.shown(read(scene), 0)
    assert world.SHAPES[scene.shape[0, 0]] in words
    assert words.endswith(list(world.BACKGROUNDS)[scene.background[0]])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("objects", [1, 2])
def test_thousands_of_clips(objects):
    """At least .99 of each attribute right, at most .01 of wrong ones passed; 1,024 clips each."""
    hits, passed = {}, {}
    for seed in range(64):
        scene = scenes(16, seed=1000 + seed, objects=objects)
        seen = read(scene)
        for name, right in seen.right(scene.attributes()).items():
            hits.setdefault(name, []).append(right)
            if name != "count":
                wrong = seen.right(altered(scene, name))
                passed.setdefault(name, []).append(torch.stack(list(wrong.values())).all(0))
    rates = {name: torch.cat(v).float().mean().item() for name, v in hits.items()}
    wrongs = {name: torch.cat(v).float().mean().item() for name, v in passed.items()}
    assert min(rates.values()) >= 0.99, rates
    assert max(wrongs.values()) <= 0.01, wrongs
