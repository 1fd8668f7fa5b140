"""Labels as a tree of tokens."""

from pipelines.label_tree import label_tree


def test_labels_of_different_first_tokens_part_once() -> None:
    tree = label_tree([[5, 6, 1], [7, 1], [8, 9, 4, 1]])
    assert tree.prefixes == ((),)
    assert tree.nexts == ((5, 7, 8),)
    assert tree.steps == (((0, 5),), ((0, 7),), ((0, 8),))


def test_each_parting_is_a_choice_of_the_labels_that_come_to_it() -> None:
    tree = label_tree([[5, 6, 1], [5, 7, 1], [5, 1], [8, 1]])
    assert tree.prefixes == ((), (5,))
    assert tree.nexts == ((5, 8), (6, 7, 1))
    assert tree.steps == (((0, 5), (1, 6)), ((0, 5), (1, 7)), ((0, 5), (1, 1)), ((0, 8),))


def test_what_all_labels_begin_with_is_no_choice_but_the_first() -> None:
    assert label_tree([[5, 6, 7, 1], [5, 6, 8, 1]]).prefixes == ((), (5, 6))


def test_one_label_and_labels_of_the_same_tokens() -> None:
    assert label_tree([[5, 1]]).nexts == ((5,),)
    assert label_tree([[5, 1], [5, 1], [6, 1]]).steps == (((0, 5),), ((0, 5),), ((0, 6),))
