//! Parquet files of a task's columns, written for tests.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

/// A column with its rows.
pub enum Column {
    Text(&'static str, Vec<&'static str>),
    Class(Vec<i64>),
    Score(Vec<f64>),
}

/// Writes the file `path` with the writer's default properties.
pub fn store(path: &Path, columns: &[Column]) {
    store_with(path, columns, WriterProperties::default());
}

/// Writes the file `path` with these properties.
pub fn store_with(path: &Path, columns: &[Column], properties: WriterProperties) {
    let fields = columns.iter().map(|column| match column {
        Column::Text(name, _) => format!("required binary {name} (UTF8); "),
        Column::Class(_) => "required int64 label; ".to_owned(),
        Column::Score(_) => "required double label; ".to_owned(),
    });
    let fields: String = fields.collect();
    let schema = Arc::new(parse_message_type(&format!("message schema {{ {fields}}}")).unwrap());
    let mut writer =
        SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for column in columns {
        let mut target = group.next_column().unwrap().unwrap();
        match column {
            Column::Text(_, rows) => {
                let rows: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(*row)).collect();
                target.typed::<ByteArrayType>().write_batch(&rows, None, None).unwrap();
            }
            Column::Class(rows) => {
                target.typed::<Int64Type>().write_batch(rows, None, None).unwrap();
            }
            Column::Score(rows) => {
                target.typed::<DoubleType>().write_batch(rows, None, None).unwrap();
            }
        }
        target.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}
