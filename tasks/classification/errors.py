"""The errors of this task, and what a user of the command line can do about them."""
import datasets
from training.data import folders, images, shard_list, shards
from utils import UsageError, UserError

from .. import networks


class UnknownPolicyError(UsageError):
    """timm knows no such augmentation policy."""


class TooFewClassesError(UsageError):
    """Fewer classes were asked for than the data holds."""


class NothingToEvaluateError(UserError):
    """There are no images of the split to evaluate on."""


class OneClassError(UserError):
    """A training set of one class, of which any answer is right."""


class NoTokenHeadError(UsageError):
    """Token labels were asked for, and the model has no head for them."""


class TeacherClassesError(UserError):
    """The published classifier of a teacher has other classes than the data."""


class TeacherWeightsError(UserError):
    """The published weights of a teacher cannot be loaded."""


class TeacherModelError(UserError):
    """The weights of a teacher are those of another model."""


ADVICE = {
    images.UnreadableFileError: "remove it, or pass --skip_bad_images",
    images.UnreadableMemberError: "pass --skip_bad_images, or make the shards again without it",
    datasets.MissingDataError: "or pass --download",
    folders.NoValFolderError: "--val_split 0.1 holds a tenth of the training images out instead",
    NothingToEvaluateError: "--split train evaluates on all of these images, --val_split and --seed as of a run on "
                          "those that it held out",
    folders.ValFolderError: "--val_split null evaluates on that folder",
    networks.PretrainedWeightsError: "--finetune takes a file of weights",
    networks.PretrainedClassesError: "fine-tune them first, or give their number with --nb_classes if the data's first "
                                     "classes are the same",
    networks.SegmenterWeightsError: "--task segmentation trains and evaluates it",
    networks.DetectorWeightsError: "--task detection trains and evaluates it",
    networks.OtherModelError: "--model must name the model of the weights",
    networks.UncheckedArgumentsError: "run without -O, or without --model_kwargs",
    NoTokenHeadError: "--token_label needs one",
    TeacherClassesError: "fine-tune the teacher, and give it with --teacher_path",
    TeacherWeightsError: "--teacher_path takes a file of weights",
    TeacherModelError: "--teacher_model must name the model of the weights",
    TooFewClassesError: "raise --nb_classes, or leave it out",
    shard_list.ShardCacheError: "give a --shard_cache",
    shards.ShardClassError: "see --nb_classes",
    UnknownPolicyError: "--aa takes timm's policies, or none",
}
