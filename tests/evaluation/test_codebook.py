"""Codes as pictures and where they occur, against loops over every cell."""

import pytest
import torch
from helpers import small_set

from mdlib.evaluation.codebook import cells, code_patches, survey
from mdlib.models.vqvae import VQVAE


@pytest.fixture
def surveyed():
    """A codec of 8 codes on 8×8 windows of three users (the last without windows), tokens that leave out code 5."""
    torch.manual_seed(0)
    codec = VQVAE(image_size=8, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4)
    windows = small_set(users=(4, 7, 9), n=3).select(slice(0, 6))
    tokens = torch.randint(0, 7, (6, *codec.token_shape))
    tokens[tokens == 5] = 7
    return codec, windows, tokens, survey(codec, windows, tokens)


def test_a_code_shows_the_mean_of_its_cells(surveyed):
    codec, windows, tokens, book = surveyed
    decoded = codec.decode_tokens(tokens).detach()
    for shown, images in ((book.decoded, decoded), (book.real, windows.float())):
        for code in set(tokens.flatten().tolist()):
            mine = [
                images[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                for n, row, column in (tokens == code).nonzero().tolist()
            ]
            torch.testing.assert_close(shown[code], torch.stack(mine).mean(0))


def test_an_unused_code_is_decoded_alone(surveyed):
    codec, _, _, book = surveyed
    alone = codec.decode_tokens(torch.full((1, 4, 4), 5)).detach()
    torch.testing.assert_close(book.decoded[5], alone[0, :, 4:6, 4:6])
    assert book.real[5].isnan().all() and book.times[5] == 0 and book.windows_with(5) == []


def test_use_is_counted_by_user_cell_and_window(surveyed):
    _, windows, tokens, book = surveyed
    for code in range(8):
        times = [int((grid == code).sum()) for grid in tokens]
        assert book.times[code] == sum(times)
        assert book.rates[0, code] == pytest.approx(sum(times[:3]) / 3)
        assert book.rates[1, code] == pytest.approx(sum(times[3:]) / 3)
        assert book.places(code)[1, 2] == pytest.approx(sum(grid[1, 2] == code for grid in tokens) / 6)
        most = sorted((max(times[:3]), max(times[3:])), reverse=True)
        assert [times[row] for row in book.windows_with(code)] == [count for count in most if count]
        assert len({int(windows.labels[row]) for row in book.windows_with(code)}) == len(book.windows_with(code))
    assert book.rates[2].isnan().all(), "nothing is known of a user without windows"


def test_the_most_telling_code_is_the_one_that_users_share_least(surveyed):
    codec, windows, _, _ = surveyed
    tokens = torch.zeros(6, *codec.token_shape, dtype=torch.long)
    tokens[:, 0, :2] = 3  # everybody's
    tokens[3:, 2, 1:3] = 6  # the second user's
    tokens[:3, 2, 1], tokens[:3, 2, 2] = 3, 2
    assert survey(codec, windows, tokens).most_telling() == 6


def test_cells_of_unequal_sides_lie_where_they_are():
    images = torch.arange(2 * 1 * 4 * 6.0).view(2, 1, 4, 6)
    cut = cells(images, (2, 2))
    assert torch.equal(cut[1, 0, 1], images[1, :, :2, 3:])
    tokens = torch.tensor([[[0, 1], [1, 1]], [[1, 1], [1, 1]]])
    assert torch.equal(code_patches(images, tokens, 3)[0], images[0, :, :2, :3])
