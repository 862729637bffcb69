"""Lists of videos in every supported format, right and wrong: errors name the file and the row."""

import json

import pytest

from img2vid.data.errors import ListError
from img2vid.data.lists import read_list
from img2vid.data.manifest import Row, read_manifest, write_manifest


def put(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def table(videos, folder):
    """(path below the folder, label, captions) of each row."""
    return [(row.path.removeprefix(f"{folder}/"), row.label, row.captions) for row in videos.rows]


def test_manifest_csv(tmp_path):
    path = put(
        tmp_path,
        "a.csv",
        "\ufeffpath,label,captions,start_seconds,end_seconds,extra\n"
        'a b.mp4,run,"[""x, y"", ""z""]",1.5,3,\n/abs/c.mp4,jump,,,,q\n',
    )
    videos = read_list(path)
    assert videos.class_names == ("jump", "run")
    assert videos.rows[0] == Row(f"{tmp_path}/a b.mp4", 1, ("x, y", "z"), 1.5, 3.0)
    assert videos.rows[1] == Row("/abs/c.mp4", 0)
    assert videos.rows[1].where == f"{path} row 3"
    assert read_list(path, classes=["run", "walk", "jump"]).rows[0].label == 0
    assert read_list(path, root="/data").rows[0].path == "/data/a b.mp4"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_manifests_survive_the_round_trip(tmp_path, suffix):
    rows = [
        Row("/v/a.mp4", 'läuft, "schnell"', ("one",), None, None, 40),
        Row("/v/b.mp4", "steht", ("one", "two\nlines"), 0.25, 1.0, None),
        Row("/v/c.mp4"),
    ]
    write_manifest(rows, tmp_path / f"m{suffix}")
    assert read_manifest(tmp_path / f"m{suffix}") == rows
    assert [entry.name for entry in tmp_path.iterdir()] == [f"m{suffix}"]  # no temporary file left


def test_a_failed_write_leaves_the_old_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest([Row("/v/a.mp4")], path)
    with pytest.raises(TypeError):
        write_manifest([Row("/v/b.mp4"), Row("/v/c.mp4", label={1, 2})], path)
    assert read_manifest(path) == [Row("/v/a.mp4")] and len(list(tmp_path.iterdir())) == 1


def test_plain_lists(tmp_path):
    spaces = put(tmp_path, "train.txt", "my videos/a 1.mp4 3\n\nb.mp4 0\n")
    assert table(read_list(spaces), tmp_path) == [("my videos/a 1.mp4", 3, ()), ("b.mp4", 0, ())]
    commas = put(tmp_path, "train.csv", "my, videos/a.mp4,3\nb.mp4,12\n")
    assert table(read_list(commas), tmp_path) == [("my, videos/a.mp4", 3, ()), ("b.mp4", 12, ())]
    names = put(tmp_path, "names.txt", "a.mp4 walk\nb.mp4 run\n")
    assert table(read_list(names), tmp_path) == [("a.mp4", 1, ()), ("b.mp4", 0, ())]
    classes = put(tmp_path, "classes.txt", "walk\nrun\n")
    assert table(read_list(names, classes=classes), tmp_path) == [("a.mp4", 0, ()), ("b.mp4", 1, ())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"a,b.mp4",3\n"c.mp4",4\n', [("a,b.mp4", 3), ("c.mp4", 4)]),
        ('"a ""x"".mp4",one\nc.mp4,"two, three"\n', [('a "x".mp4', "one"), ("c.mp4", "two, three")]),
        ("a,1.mp4 3\nb,2.mp4 4\n", [("a,1.mp4", 3), ("b,2.mp4", 4)]),  # commas in paths separate nothing
        ("a.mp4 riding a bike\nb c.mp4 golf\n", [("a.mp4", "riding a bike"), ("b c.mp4", "golf")]),
        ("a.mp4\triding a bike\nb\tgolf\n", [("a.mp4", "riding a bike"), ("b", "golf")]),
        ("\ufeffa.mp4 3\r\nb.mp4 4\r\n", [("a.mp4", 3), ("b.mp4", 4)]),
    ],
)
def test_spaces_commas_and_quotes_in_plain_lists(tmp_path, text, expected):
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode())
    videos = read_list(path)
    name = lambda label: videos.class_names[label] if videos.class_names else label  # noqa: E731
    assert [(row.path.removeprefix(f"{tmp_path}/"), name(row.label)) for row in videos.rows] == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.csv", "video,label\na.mp4,3\n", "row 1: 'video,label' is a header"),
        ("l.txt", "Path\tLabel\na.mp4\trun\n", "is a header"),
        ("l.csv", "pth,label\na.mp4,run\n", "row 1: 'pth,label' is a header"),
        ("l.txt", "frames/a.mp4 120 3\n", "row 1: .* more than one number"),
        ("l.txt", "a.mp4 3\nb.mp4 golf\n", "row 2: label 'golf' is a name, but '3' .*row 1. is a number"),
        ("l.txt", "a.mp4 -1\nb.mp4 -1\n", "row 1: label '-1': class numbers are 0, 1, 2"),
        ("l.csv", "path,label\na.mp4,1.5\n", "row 2: label '1.5'"),
        ("l.jsonl", '{"path": "a.mp4", "label": -3}\n', "row 1: label -3"),
    ],
)
def test_lists_that_could_be_misread_are_refused(tmp_path, name, text, words):
    with pytest.raises(ListError, match=words):
        read_list(put(tmp_path, name, text))


def test_tables_as_other_programs_write_them(tmp_path):
    quoted = put(tmp_path, "a.csv", '"path", "label", "frames"\na.mp4, run , 12.0\nb.mp4,jump,\n')
    videos = read_list(quoted)
    assert videos.class_names == ("jump", "run") and videos.rows[0].frames == 12
    floats = put(tmp_path, "b.csv", "path,label\na.mp4,1.0\nb.mp4,\n")
    assert [row.label for row in read_list(floats).rows] == [1, None]
    kinetics = put(
        tmp_path, "k.csv", '"label","youtube_id","time_start","time_end","split"\n"a, b","-x",1,11,"train"\n'
    )
    assert read_list(kinetics).class_names == ("a, b",)


def test_damaged_companions_are_named(tmp_path):
    records = put(tmp_path, "train.json", '[{"id": "1", "label": "x", "template": "Folding [something]"}]')
    put(tmp_path, "labels.json", '{"Folding something": "zero"}')
    with pytest.raises(ListError, match=r"labels\.json: expected class names and numbers"):
        read_list(records)
    put(tmp_path, "labels.json", '{"Folding something": "0"}')
    put(tmp_path, "train.json", "[3]")
    with pytest.raises(ListError, match=r"train\.json row 1: expected an object with id and template, found 3"):
        read_list(records)
    videos = put(tmp_path, "MSRVTT_train.9k.csv", "video_id\nvideo1\n")
    put(tmp_path, "MSRVTT_data.json", '{"sentences": [{"video_id": "video1"}]}')
    with pytest.raises(ListError, match=r"MSRVTT_data\.json sentence 1: caption missing"):
        read_list(videos)


def test_a_folder_per_class(tmp_path):
    for name in ("run/b.mp4", "run/a.AVI", "jump/c.webm", "jump/notes.txt", ".git/x.mp4", "jump/frames/f_1.jpg"):
        put(tmp_path, name, "")
    videos = read_list(tmp_path)
    assert videos.class_names == ("jump", "run")
    assert table(videos, tmp_path) == [
        ("jump/c.webm", 0, ()),
        ("jump/frames", 0, ()),
        ("run/a.AVI", 1, ()),
        ("run/b.mp4", 1, ()),
    ]


def test_kinetics(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    path = put(tmp_path, "val.csv", header + 'playing harp,-abc,12,22,validate\n"a, b",xyz,0,10.0,validate\n')
    put(tmp_path, "playing harp/-abc_000012_000022.mp4", "")
    videos = read_list(path)
    assert table(videos, tmp_path) == [("playing harp/-abc_000012_000022.mp4", 1, ()), ("xyz_000000_000010.mp4", 0, ())]
    test = put(
        tmp_path, "test.csv", "youtube_id,time_start,time_end,split\nxyz,5,15,test\n"
    )  # published without labels
    assert table(read_list(test), tmp_path) == [("xyz_000005_000015.mp4", None, ())]


def test_ucf101(tmp_path):
    put(tmp_path, "classInd.txt", "1 ApplyEyeMakeup\n2 Archery\n")
    train = put(tmp_path, "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2\nApplyEyeMakeup/v_x.avi 1\n")
    test = put(tmp_path, "testlist01.txt", "Archery/v_y.avi\n")
    videos = read_list(train, root="/ucf")
    assert videos.class_names == ("ApplyEyeMakeup", "Archery")
    assert table(videos, "/ucf") == [("Archery/v_Archery_g08_c01.avi", 1, ()), ("ApplyEyeMakeup/v_x.avi", 0, ())]
    assert table(read_list(test, root="/ucf"), "/ucf") == [("Archery/v_y.avi", 1, ())]


def test_hmdb51(tmp_path):
    put(tmp_path, "brush_hair_test_split1.txt", "a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    put(tmp_path, "wave_test_split1.txt", "d.avi 1\n")
    put(tmp_path, "wave_test_split2.txt", "d.avi 2\n")
    assert table(read_list(tmp_path, root="/h"), "/h") == [("brush_hair/a.avi", 0, ()), ("wave/d.avi", 1, ())]
    assert table(read_list(tmp_path, root="/h", subset="test"), "/h") == [("brush_hair/b.avi", 0, ())]
    with pytest.raises(ListError, match="split3"):
        read_list(tmp_path, format="hmdb51", split=3)


def test_ssv2(tmp_path):
    put(tmp_path, "labels.json", json.dumps({"Pushing something left": "1", "Lifting something": "0"}))
    records = [{"id": "78687", "label": "pushing cup left", "template": "Pushing [something] left"}]
    videos = read_list(put(tmp_path, "train.json", json.dumps(records)))
    assert videos.class_names == ("Lifting something", "Pushing something left")
    assert table(videos, tmp_path) == [("78687.webm", 1, ("pushing cup left",))]


def test_msrvtt(tmp_path):
    test = put(
        tmp_path, "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\nret0,msr9770,video9770,a person plays\n"
    )
    assert table(read_list(test), tmp_path) == [("video9770.mp4", None, ("a person plays",))]
    train = put(tmp_path, "MSRVTT_train.9k.csv", "video_id\nvideo0\n")
    sentences = [{"video_id": "video0", "caption": c} for c in ("a car", "a red car")]
    put(tmp_path, "MSRVTT_data.json", json.dumps({"videos": [], "sentences": sentences}))
    assert table(read_list(train), tmp_path) == [("video0.mp4", None, ("a car", "a red car"))]


BAD = {
    "m1.csv": ("path,label\na.mp4,1\n,2\n", "m1.csv row 3: no path"),
    "m2.csv": ("path,label\na.mp4,1,2\n", "m2.csv row 2: expected 2 fields"),
    "m3.csv": ("path,start_seconds\na.mp4,soon\n", "m3.csv row 2: start_seconds must be a number: 'soon'"),
    "m4.csv": ("path,start_seconds,end_seconds\na.mp4,3,2\n", "m4.csv row 2: the time range from 3.0 to 2.0"),
    "m5.csv": ("path,captions\na.mp4,hello\n", "m5.csv row 2: captions must be a JSON list"),
    "m6.csv": ("path,frames\na.mp4,0\n", "m6.csv row 2: frames=0"),
    "m7.csv": ("path\n", "m7.csv: the list is empty"),
    "m8.csv": ("path,start_seconds\na.mp4,nan\n", "row 2: start_seconds must be a number"),
    "m9.csv": ("path,path,label\na.mp4,b.mp4,1\n", "m9.csv row 1: there are several columns named 'path'"),
    "m10.csv": ("path\nhttps://example.org/a.mp4\n", "m10.csv row 2: path must be that of a file or folder here"),
    "m11.csv": ("path\na.mp4\n" + "b" * 200_000 + "\n", "m11.csv row 2: not CSV (field larger"),
    "m12.csv": ('path,captions\na.mp4,"' + "[" * 100_000 + '"\n', "m12.csv row 2: captions must be a JSON list"),
    "j0.jsonl": ('{"path": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "j0.jsonl row 1: not JSON"),
    "j5.jsonl": ('{"path": 3}\n', "j5.jsonl row 1: path must be that of a file or folder here, as text: 3"),
    "j1.jsonl": ('{"path": "a.mp4"}\n{"path": \n', "j1.jsonl row 2: not JSON"),
    "j2.jsonl": ('["a.mp4"]\n', "j2.jsonl row 1: expected an object"),
    "j3.jsonl": ('{"path": "a.mp4", "captions": [1]}\n', "row 1: captions must be a list of sentences"),
    "j4.jsonl": ('{"path": "a.mp4", "label": [1]}\n', "row 1: label must be a class number or name"),
    "p1.parquet": ("this is no parquet", "p1.parquet: not readable as Parquet"),
    "l1.txt": ("a.mp4 1\nb.mp4\n", "l1.txt row 2: expected 'path label'"),
    "k1.csv": ("label,youtube_id,time_start,time_end\na,,1,2\n", "k1.csv row 2: youtube_id missing"),
    "k2.csv": ("label,youtube_id,time_start,time_end\na,b,x,2\n", "k2.csv row 2: time_start and time_end"),
    "trainlist01.txt": ("Archery/a.avi 2\n", "classInd.txt: no such file"),
    "s1.json": ("[]", "labels.json: no such file"),
    "v.csv": ("video_id\nvideo1\n", "MSRVTT_data.json: no such file"),
    "empty.txt": ("", "empty.txt: the list is empty"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_errors_name_file_and_row(tmp_path, name):
    content, words = BAD[name]
    path = put(tmp_path, name, content)
    with pytest.raises(ListError) as caught:
        read_list(path)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


def test_more_wrong_lists(tmp_path):
    with pytest.raises(ListError, match="no such file or folder"):
        read_list(tmp_path / "nothing.csv")
    with pytest.raises(ListError, match="expected 'auto', 'manifest', 'list'"):
        read_list(tmp_path, format="coco")
    (tmp_path / "latin.txt").write_bytes("vidéo.mp4 1\n".encode("latin-1"))
    with pytest.raises(ListError, match=r"latin\.txt: not UTF-8"):
        read_list(tmp_path / "latin.txt")
    names = put(tmp_path, "n.txt", "a.mp4 walk\nb.mp4 fly\n")
    with pytest.raises(ListError, match=r"n\.txt row 2: label 'fly' is none of the 2 classes"):
        read_list(names, classes=["walk", "run"])
    with pytest.raises(ListError, match=r"row 1: label 7 is none of the 2 classes"):
        read_list(put(tmp_path, "n7.txt", "a.mp4 7\n"), classes=["walk", "run"])
    with pytest.raises(ListError, match="duplicates"):
        read_list(names, classes=["walk", "walk"])
    (tmp_path / "classes" / "a").mkdir(parents=True)
    with pytest.raises(ListError, match="none of its 1 folders holds a video"):
        read_list(tmp_path / "classes")
    (tmp_path / "loose").mkdir()
    video = put(tmp_path, "loose/a.mp4", "")
    with pytest.raises(ListError, match="expected .*CLASS/VIDEO. The 1 videos side by side"):
        read_list(tmp_path / "loose")
    for format in ("auto", "list"):
        with pytest.raises(ListError, match="a video, expected a list"):
            read_list(video, format=format)
    put(tmp_path, "set/videos/a.mp4", "")
    assert read_list(tmp_path / "set").class_names == ("videos",)
    put(tmp_path, "set/train.csv", "path,label\nvideos/a.mp4,walk\n")
    with pytest.raises(
        ListError, match=r"in one folder, videos, .* train\.csv\. Give one of them, such as .*train\.csv"
    ):
        read_list(tmp_path / "set")
    assert len(read_list(tmp_path / "set", format="folder")) == 1
    put(tmp_path, "ucf/classInd.txt", "0 Archery\n")
    with pytest.raises(ListError, match=r"classInd\.txt row 1: expected '1 ClassName'"):
        read_list(put(tmp_path, "ucf/trainlist02.txt", "Archery/a.avi 1\n"))
    put(tmp_path, "ucf/classInd.txt", "1 Archery\n")
    with pytest.raises(ListError, match=r"trainlist02\.txt row 1: says class 5, but Archery is 1"):
        read_list(put(tmp_path, "ucf/trainlist02.txt", "Archery/a.avi 5\n"))
    put(tmp_path, "h/wave_test_split1.txt", "a.avi 1\nb.avi 7\n")
    with pytest.raises(ListError, match=r"split1\.txt row 2: expected"):
        read_list(tmp_path / "h")
